{{- define "nats.fullname" -}}
{{- printf "%s-%s" .Release.Name (default .Chart.Name .Values.nameOverride) | trunc 50 | trimSuffix "-" -}}
{{- end -}}

{{- define "nats.selectorLabels" -}}
app.kubernetes.io/name: mimo-nats
app.kubernetes.io/instance: {{ .Release.Name | quote }}
{{- end -}}

{{- define "nats.labels" -}}
{{ include "nats.selectorLabels" . }}
app.kubernetes.io/component: queue
app.kubernetes.io/part-of: mimo-cluster
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" }}
{{- end -}}

{{- /* The volume in MiB. */ -}}
{{- define "nats.volumeMebibytes" -}}
{{- $size := .Values.storage.size -}}
{{- if hasSuffix "Ti" $size -}}
{{- mul (trimSuffix "Ti" $size) 1048576 -}}
{{- else if hasSuffix "Gi" $size -}}
{{- mul (trimSuffix "Gi" $size) 1024 -}}
{{- else -}}
{{- trimSuffix "Mi" $size -}}
{{- end -}}
{{- end -}}

{{- /*
What the stream of requests may hold, in MiB: 40 % of the volume. A block is rewritten once more than half of it is deleted,
so on disk that is at most 80 %.
*/ -}}
{{- define "nats.requestsMebibytes" -}}
{{- div (mul (include "nats.volumeMebibytes" .) 4) 10 -}}
{{- end -}}

{{- define "nats.encryptionSecret" -}}
{{- default (printf "%s-encryption" (include "nats.fullname" .)) .Values.encryption.existingSecret -}}
{{- end -}}
