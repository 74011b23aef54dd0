"""Ray's client of a dashboard, with a limit to each request: Ray's own would wait forever for one that does not answer. [ray]"""

from __future__ import annotations

from typing import Any

from ray.job_submission import JobSubmissionClient

ANSWERS_WITHIN_S = 60.0


class JobClient(JobSubmissionClient):
    def _do_request(self, method: str, endpoint: str, **settings: Any) -> Any:
        return super()._do_request(method, endpoint, **{"timeout": ANSWERS_WITHIN_S, **settings})
