module mimo-cluster.dev/tests/pause

go 1.26.0
