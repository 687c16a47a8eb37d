"""What stages run on: timers, batch sizes, threads."""
