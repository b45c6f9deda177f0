"""Policies that look at the step alone: schedules that freeze the same layers whatever the network learns."""
