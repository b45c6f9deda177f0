"""Data, models and objectives of the tasks of `smartfrz bench policies`."""
