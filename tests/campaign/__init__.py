"""The fault campaign: trials of a seed that break a store on purpose and hold what is left against an oracle."""
