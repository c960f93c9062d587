"""What every other package uses: errors, files, seeds, the cache, the device, precision, progress, trackers, processes.

Modules here import nothing else of this project.
"""
