"""`prx plan`: what a recipe costs before it runs: time, money, memory, disk."""
