"""Training on Lightning. Needs the extra `train`; the modules are imported one by one, so that `fastvae` itself does not need it."""
