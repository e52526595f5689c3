{{/* Names, labels and the parts that every pod shares. */}}

{{- define "mimo.fullname" -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride -}}
{{- else -}}
{{- $name := default .Chart.Name .Values.nameOverride -}}
{{- ternary .Release.Name (printf "%s-%s" .Release.Name $name) (contains $name .Release.Name) | trunc 40 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}

{{/* (dict "root" $ "component" "gateway"): what never changes, so that it can select. */}}
{{- define "mimo.selectorLabels" -}}
app.kubernetes.io/name: mimo-{{ .component }}
app.kubernetes.io/instance: {{ .root.Release.Name | quote }}
{{- end -}}

{{- define "mimo.labels" -}}
{{ include "mimo.selectorLabels" . }}
app.kubernetes.io/component: {{ .component }}
app.kubernetes.io/part-of: mimo-cluster
app.kubernetes.io/version: {{ .root.Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .root.Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .root.Chart.Name .root.Chart.Version | replace "+" "_" }}
{{- end -}}

{{/* (dict "root" $ "image" .Values.images.gateway) */}}
{{- define "mimo.image" -}}
{{- $repository := ternary (printf "%s/%s" .root.Values.images.registry .image.repository) .image.repository (ne .root.Values.images.registry "") -}}
{{- if .image.digest -}}
{{ $repository }}@{{ .image.digest }}
{{- else -}}
{{ $repository }}:{{ default .root.Chart.AppVersion .image.tag }}
{{- end -}}
{{- end -}}

{{- define "mimo.pullSecrets" -}}
{{- with .Values.images.pullSecrets }}
imagePullSecrets:
  {{- range . }}
  - name: {{ . | quote }}
  {{- end }}
{{- end }}
{{- end -}}

{{/* What Pod Security "restricted" asks of a pod; 10001 is the images' user. */}}
{{- define "mimo.podSecurityContext" -}}
runAsNonRoot: true
runAsUser: 10001
runAsGroup: 10001
fsGroup: 10001
seccompProfile:
  type: RuntimeDefault
{{- end -}}

{{- define "mimo.containerSecurityContext" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities:
  drop: [ALL]
{{- end -}}

{{/* (dict "root" $ "component" "gateway" "values" .Values.gateway): where pods may run. */}}
{{- define "mimo.placement" -}}
{{- with .values.priorityClassName }}
priorityClassName: {{ . | quote }}
{{- end }}
{{- with .values.nodeSelector }}
nodeSelector:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .values.tolerations }}
tolerations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .values.affinity }}
affinity:
  {{- toYaml . | nindent 2 }}
{{- end }}
topologySpreadConstraints:
  # Pods of one revision at a time: those of the last one do not push the next ones together.
  - topologyKey: kubernetes.io/hostname
    maxSkew: 1
    whenUnsatisfiable: {{ ternary "DoNotSchedule" "ScheduleAnyway" (eq .values.spread "required") }}
    labelSelector:
      matchLabels:
        {{- include "mimo.selectorLabels" . | nindent 8 }}
    matchLabelKeys: [pod-template-hash]
  - topologyKey: topology.kubernetes.io/zone
    maxSkew: 1
    whenUnsatisfiable: ScheduleAnyway
    labelSelector:
      matchLabels:
        {{- include "mimo.selectorLabels" . | nindent 8 }}
    matchLabelKeys: [pod-template-hash]
{{- end -}}

{{/* A container's variables from a map; later maps win, and numbers become text. */}}
{{- define "mimo.env" -}}
{{- range $name, $value := . }}
- name: {{ $name }}
  value: {{ $value | quote }}
{{- end }}
{{- end -}}

{{- define "mimo.natsUrls" -}}
{{- if .Values.nats.enabled -}}
nats://{{ include "nats.fullname" .Subcharts.nats }}.{{ .Release.Namespace }}.svc:4222
{{- else -}}
{{ join "," .Values.nats.externalUrls }}
{{- end -}}
{{- end -}}

{{- define "mimo.cacheClaim" -}}
{{- if eq .Values.modelCache.type "pvc" -}}
{{ default (printf "%s-model-cache" (include "mimo.fullname" .)) .Values.modelCache.pvc.existingClaim }}
{{- end -}}
{{- end -}}

{{- define "mimo.tenantSecret" -}}
{{ include "mimo.fullname" . }}-tenant-keys
{{- end -}}
