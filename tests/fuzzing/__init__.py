"""Everything that reads what comes from outside, as functions of bytes, for hypothesis and for a fuzzer."""
