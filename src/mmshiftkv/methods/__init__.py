"""Ways to score the tokens of a prompt, one a file."""
