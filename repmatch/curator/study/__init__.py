"""Studies: what the measure sees in the user's own data, each with a verdict in plain words."""
