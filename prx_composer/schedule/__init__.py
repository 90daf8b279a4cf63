"""When things happen: points of time and windows (`moments`), seconds of training and the end that a budget brings (`clock`)."""
