"""How the language model learns."""
