"""A video of what the robot should do, imagined from a picture and a sentence, turned into motion and executed."""
