"""`prx encode text|features|latents`: compute once what training would compute in every step, and store it with the data."""
