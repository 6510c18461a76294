"""One file a command: each parses, calls one library function and renders."""
