"""The version of this package: one line, read by the build as well."""

VERSION = "0.1.0"
