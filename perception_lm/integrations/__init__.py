"""Other libraries' parts behind our protocols. Each file imports its library when it is used, and never before."""
