"""What a policy gets to see, gathered while training runs."""
