"""The draft pool: slots, spans and the rows of running requests."""
