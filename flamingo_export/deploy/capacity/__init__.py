"""How many replicas a load needs: the real engine under a virtual clock, with costs that `bench --json --grid` measured."""
