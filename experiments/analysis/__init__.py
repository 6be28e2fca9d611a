"""What can be counted on a step without running it: operations, memory, exchanged bytes."""
