"""What is known of a model: its blocks, how its layers make queries, what they see, and what its masks mean."""
