"""What stands between a socket and an answer: connections, faults, keys and hosts, limits, streams, health."""
