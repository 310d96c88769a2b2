"""Long work on the graph: what state it is in, how far it got, and how it is ended."""

from fleecer.jobs.backup import BackupJob, BackupRequest, start_backups
from fleecer.jobs.job import Job, JobTable

__all__ = ["BackupJob", "BackupRequest", "Job", "JobTable", "start_backups"]
