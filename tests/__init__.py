"""The tests: a package, so that tests/systemd and tests/qemu are not taken for other packages."""
