"""What compiled code shows without a GPU: which launches there are, what the compiler makes of them, and what they move."""
