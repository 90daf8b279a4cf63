"""`prx report`: a run as one page of charts, samples and stages."""
