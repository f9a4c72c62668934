"""Parity against transformers: expected values from its own IDEFICS, run whole or part by part on the checkpoint's tensors."""

KNOWN = ("idefics", "llama_vision")
"""Families of checkpoints whose model in transformers can be compared with."""


def corrections_of(family: str | None) -> str:
    """What transformers' model of a family is changed in before it is compared with; empty for none."""
    if family != "llama_vision":
        return ""
    return (
        "transformers' model corrected as Meta's code computes: features are the inputs of the listed vision layers, not their outputs; a "
        "token before the first image passes a gated block unchanged"
    )
