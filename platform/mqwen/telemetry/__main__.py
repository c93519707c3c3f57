"""python -m mqwen.telemetry > platform/mqwen/telemetry/METRICS.md"""

from mqwen.telemetry.catalogue import table

print(table(), end="")
