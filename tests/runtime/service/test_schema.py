"""The service keeps to its own OpenAPI description, whatever is sent."""

import pytest

schemathesis = pytest.importorskip("schemathesis")
pytest.importorskip("starlette")

import hypothesis
from hypothesis import HealthCheck
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from gap_runtime import Bundle, Grounder
from gap_runtime.service.app import Service
from gap_runtime.service.models import Models
from gap_runtime.service.settings import ServiceSettings

# Left out: that all that fits the schema is accepted. No schema says what is a picture.
CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    negative_data_rejection,
]


def test_requests_made_from_the_description_are_answered_as_it_says(make_bundle, answer_with):
    answer_with(11)
    settings = ServiceSettings(host_names=("testserver",))
    service = Service(Models([Grounder(Bundle.open(make_bundle()))], settings), settings)
    schema = schemathesis.openapi.from_asgi("/openapi.json", service.app)
    asked = []
    for operation in schema.get_all_operations():
        found = operation.ok()

        @hypothesis.settings(
            max_examples=12,
            deadline=None,
            derandomize=True,
            database=None,
            suppress_health_check=list(HealthCheck),
        )
        @hypothesis.given(case=found.as_strategy())
        def run(case):
            asked.append(case.operation.label)
            case.call_and_validate(checks=CHECKS)

        run()
    assert {*asked} >= {"POST /v1/ground", "POST /v1/chat/completions", "GET /v1/models"}
