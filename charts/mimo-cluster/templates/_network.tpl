{{/* Peers and rules that several policies share. */}}

{{- define "mimo.policyPods" -}}
podSelector:
  matchLabels:
    {{- include "mimo.selectorLabels" . | nindent 4 }}
{{- end -}}

{{/* Pods that the controller makes: those of groups, and those that prepare a model. No release's name is on them. */}}
{{- define "mimo.policyWorkers" -}}
podSelector:
  matchLabels:
    app.kubernetes.io/name: mimo-worker
    app.kubernetes.io/managed-by: mimo-controller
{{- end -}}

{{- define "mimo.policyGroups" -}}
{{ include "mimo.policyWorkers" . }}
    app.kubernetes.io/component: group
{{- end -}}

{{- define "mimo.policyDns" -}}
- ports:
    - {port: 53, protocol: UDP}
    - {port: 53, protocol: TCP}
  {{- with .Values.networkPolicy.dnsPeers }}
  to:
    {{- toYaml . | nindent 4 }}
  {{- end }}
{{- end -}}

{{- define "mimo.policyMetrics" -}}
{{- with .root.Values.networkPolicy.metricsPeers -}}
- ports:
    - {port: {{ $.port }}, protocol: TCP}
  from:
    {{- toYaml . | nindent 4 }}
{{- end -}}
{{- end -}}

{{/* Blocks of addresses as peers; nothing where there are none, which means every address. */}}
{{- define "mimo.policyCidrs" -}}
{{- with . -}}
to:
  {{- range . }}
  - ipBlock: {cidr: {{ . | quote }}}
  {{- end }}
{{- end -}}
{{- end -}}

{{- define "mimo.policyNats" -}}
{{- $ports := list -}}
{{- range .Values.nats.externalUrls -}}
{{- $ports = append $ports (regexFind ":[0-9]+$" . | trimPrefix ":" | default "4222" | int) -}}
{{- end -}}
- ports:
    {{- range ternary (list 4222) (uniq $ports) .Values.nats.enabled }}
    - {port: {{ . }}, protocol: TCP}
    {{- end }}
  {{- if .Values.nats.enabled }}
  to:
    - podSelector:
        matchLabels:
          {{- include "nats.selectorLabels" .Subcharts.nats | nindent 10 }}
  {{- else }}
  {{- with .Values.networkPolicy.externalNatsPeers }}
  to:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- end }}
{{- end -}}
