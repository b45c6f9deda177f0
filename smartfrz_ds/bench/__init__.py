"""What `smartfrz bench` offers, usable from Python: real engines, measured."""
