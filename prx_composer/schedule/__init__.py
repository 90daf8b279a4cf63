"""When things happen: points of time and windows (`moments`), seconds of training (`clock`), an end in time (`time_budget`)."""
