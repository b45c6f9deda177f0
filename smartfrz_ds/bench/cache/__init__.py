"""`smartfrz bench cache`: steps and whole trainings with the prefix cache, on real engines."""
