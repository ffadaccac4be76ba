"""Kernels, grouped by operator: a schema, a plain-torch specification, and backends that register themselves for a device."""
