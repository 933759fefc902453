//! Fields that Kubernetes or Istio has and our types do not: accepted, with a finding.

/// Whether the type decoded as `owner` has a field of that name in Kubernetes' or Istio's API.
pub(crate) fn is_known(owner: &str, field: &str) -> bool {
    let fields: &[&str] = match owner {
        "Container" => &["volumeDevices", "restartPolicyRules"],
        "PodSpec" => &[
            "ephemeralContainers", "os", "schedulingGates", "resourceClaims", "hostUsers", "setHostnameAsFQDN", "resources",
            "hostnameOverride", "workloadRef",
        ],
        "ServiceSpec" => &["clusterName"],
        "EnvVarSource" => &["fileKeyRef"],
        "Lifecycle" => &["stopSignal"],
        "Volume" => &[
            "awsElasticBlockStore", "azureDisk", "azureFile", "cephfs", "cinder", "fc", "flexVolume", "flocker",
            "gcePersistentDisk", "gitRepo", "glusterfs", "iscsi", "photonPersistentDisk", "portworxVolume", "quobyte", "rbd",
            "scaleIO", "storageos", "vsphereVolume",
        ],
        "VolumeProjection" => &["clusterTrustBundle", "podCertificate"],
        "PodStatus" => &[
            "ephemeralContainerStatuses", "nominatedNodeName", "resize", "resourceClaimStatuses", "extendedResourceClaimStatus",
            "allocatedResources", "resources",
        ],
        "ContainerStatus" => &["allocatedResources", "resources", "volumeMounts", "user", "allocatedResourcesStatus", "stopSignal"],
        "Endpoint" => &["topology"],
        "IstioEgressListener" => &["localhost"],
        "MeshConfig" => &[
            "thriftConfig", "enableEnvoyAccessLogService", "mixerCheckServer", "mixerReportServer", "sdsUdsPath", "authPolicy",
            "rdsRefreshDelay", "enableSdsTokenMount", "sdsUseK8sSaJwt", "useNormalTrustDomain", "proxyConfig", "network",
            "trafficPolicy", "inboundTrafficPolicies", "defaultWaypoint",
        ],
        "ProxyConfig" => &[
            "parentShutdownDuration", "discoveryRefreshDelay", "zipkinAddress", "statsdUdpAddress", "envoyMetricsServiceAddress",
            "proxyVersion", "availabilityZone", "meshId", "sds", "clusterName", "serviceNode",
        ],
        _ => &[],
    };
    fields.contains(&field)
}
