"""Pictures to vectors, vectors to answers."""
