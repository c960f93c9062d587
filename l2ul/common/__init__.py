"""What every other package uses: errors, files, random streams, the cache, the device, progress, processes, precision.

Modules here import nothing else of this project.
"""
