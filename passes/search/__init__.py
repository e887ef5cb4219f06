"""The least sum of tables over discrete variables, exactly, or a bound and its gap."""
