"""`prx report`: what became of a run, as one page."""
