"""MLflow: what is written there of a run, and read back from it. Nothing else imports mlflow."""
