"""From numbers to fewer bits: policies, matrices quantised as they stream by, and the calibration table that both read."""
