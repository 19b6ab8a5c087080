"""The commands of `jmoe`, one file each. Imported when they are asked for; none imports JAX."""
