{{- define "loraplex.fullname" -}}
{{- if contains .Chart.Name .Release.Name -}}
{{- .Release.Name | trunc 63 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name .Chart.Name | trunc 63 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}

{{- define "loraplex.selectorLabels" -}}
app.kubernetes.io/name: {{ .Chart.Name }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{- define "loraplex.labels" -}}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
{{ include "loraplex.selectorLabels" . }}
{{- end -}}

{{- /* What requests call the base, and what the ecosystem's labels may hold of it. */ -}}
{{- define "loraplex.modelLabel" -}}
{{- $name := first (append .Values.base.servedNames .Values.base.model) -}}
{{- $name | base | regexFind "[A-Za-z0-9][A-Za-z0-9._-]*" | trunc 63 | trimAll "-._" -}}
{{- end -}}

{{- define "loraplex.serviceAccount" -}}
{{- if .Values.serviceAccount.create -}}
{{- .Values.serviceAccount.name | default (include "loraplex.fullname" .) -}}
{{- else -}}
{{- .Values.serviceAccount.name | default "default" -}}
{{- end -}}
{{- end -}}

{{- define "loraplex.image" -}}
{{- $tag := .Values.image.tag | default .Chart.AppVersion -}}
{{- printf "%s:%s%s" .Values.image.repository $tag (ternary "-cuda" "" (and .Values.gpu.enabled (not .Values.image.tag))) -}}
{{- end -}}

{{- define "loraplex.hasKeys" -}}
{{- if or .Values.keys.existingSecret .Values.keys.inline -}}true{{- end -}}
{{- end -}}

{{- define "loraplex.keysSecret" -}}
{{- .Values.keys.existingSecret | default (printf "%s-keys" (include "loraplex.fullname" .)) -}}
{{- end -}}

{{- define "loraplex.adaptersClaim" -}}
{{- .Values.adapters.persistence.existingClaim | default (printf "%s-adapters" (include "loraplex.fullname" .)) -}}
{{- end -}}

{{- /* One volume for all pods: an existing claim, or the chart's for a Deployment. */ -}}
{{- define "loraplex.sharedClaim" -}}
{{- $p := .Values.adapters.persistence -}}
{{- if and $p.enabled (or $p.existingClaim (eq .Values.workload "Deployment")) -}}true{{- end -}}
{{- end -}}

{{- /* A volume for each pod, of a StatefulSet: adapters and what the server keeps across restarts. */ -}}
{{- define "loraplex.ownClaims" -}}
{{- if and .Values.adapters.persistence.enabled (not (include "loraplex.sharedClaim" .)) -}}true{{- end -}}
{{- end -}}

{{- define "loraplex.autoscaled" -}}
{{- if or .Values.autoscaling.hpa.enabled .Values.autoscaling.keda.enabled -}}true{{- end -}}
{{- end -}}

{{- /* Whether the chart's own claim can be mounted by the pods of one node (or one pod) only. */ -}}
{{- define "loraplex.singleNodeClaim" -}}
{{- $p := .Values.adapters.persistence -}}
{{- if and (include "loraplex.sharedClaim" .) (not $p.existingClaim) (not (has "ReadWriteMany" $p.accessModes)) (not (has "ReadOnlyMany" $p.accessModes)) -}}true{{- end -}}
{{- end -}}
