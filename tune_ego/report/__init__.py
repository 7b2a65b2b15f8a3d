"""`report`: what an experiment's files say, as one HTML page and as the numbers in it."""
