"""Bringing a command to many processes: here all on one machine (`local`)."""
