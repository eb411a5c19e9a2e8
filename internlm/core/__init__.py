"""The core: context, parallel layers, schedules, trainer."""
