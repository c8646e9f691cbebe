"""OpenTelemetry: calls as spans and histograms for a collector. Off unless it is asked for; its libraries come with an extra."""
