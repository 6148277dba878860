"""The `slowft` command. One file a command: parse, call the API, print."""
