"""What a recipe costs, said before anything is rented."""
