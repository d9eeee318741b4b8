"""From a barrier stage to running ranks: topology, control planes, one child process per task."""
